"""Pairs of whole answers that a judge or an oracle ordered: any model against any other."""
