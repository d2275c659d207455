"""Where weights come from and how their names are translated.

`published` is the table of released models; begin there. `pretrained` fetches one (`download`), checks it and fits it
to another head or size; `official` translates published names, strictly, both ways. `hub` finds a model that somebody
shared.
"""
