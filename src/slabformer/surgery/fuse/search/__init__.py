"""Decide: which neighbours take a norm over, or why none can.

`propose` is the entrance, `decide` the decision for one norm; begin there. `sources` looks upstream of a norm and
`stream` along a residual stream; `found` and `neighbours` collect what may take it over; `wrappers` and `ranges`
refuse. `check` refuses before anything starts, `asked` holds what the caller wants kept, `trial` tries a plan on a
copy, and `methods` names methods that would change. Nothing here touches the caller's model.
"""
