"""Find what can be folded: every norm forward into what reads it, else backward into what its input is made of.

`decide` traces a model and tries the ways in turn; begin there. `backward` and `stream` are two of the ways,
`neighbours` and `wrappers` say who may take a norm over, `trial` tries a plan on a copy and drops what changes an
output. `request` checks what the caller gives, `methods` names what a fused model computes otherwise.
"""
