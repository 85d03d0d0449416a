"""The MONAI Label side of MedVL-SAM2: parse a request, ask the predictor, write the result."""
