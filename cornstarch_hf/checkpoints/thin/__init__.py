"""Files that a checkpoint's own code has in place of files with the same names; the package itself imports none of them."""
