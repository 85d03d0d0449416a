"""Routes of our own beside those of MONAI Label, one router a file; `lib.server` includes them."""
