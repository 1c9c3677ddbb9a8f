from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Of types and shapes in the package, in every test and on every rank; an int is a float, as everywhere in Python."""
