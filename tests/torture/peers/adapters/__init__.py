"""How each peer saves and loads, as its documentation says. The name of a module here names what it imports."""
