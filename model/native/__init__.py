"""The transformer stack on CPUs, in C++: see transformer.cpp for how, library.py for how it is called."""
