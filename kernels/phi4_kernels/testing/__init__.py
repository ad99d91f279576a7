"""The checks: error rule, poisoned memory, program orders, operators, compiled resources."""
