"""A page about finished runs, side by side: figures, numbers and what they cost.

finished.py  a working directory, read and never written
measures.py  what networks say of its images
costs.py     seconds, FLOP and bytes
gathered.py  what the parts of a page are made of
accuracy.py pictures.py features.py students.py teachers.py    the parts
sections.py  all of them, in their order
__main__.py  the command line
"""
