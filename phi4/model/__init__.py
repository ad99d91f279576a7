"""Phi-4's architecture without torch: sizes, tensor names, GPU data sheets, generation requests."""
