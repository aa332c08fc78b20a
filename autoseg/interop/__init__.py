"""Other programs' files: one module, or a group of modules of one prefix, a program."""
