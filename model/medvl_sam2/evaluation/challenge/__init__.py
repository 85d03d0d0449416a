"""The CVPR 2025 interactive 3D segmentation protocol (CVPR-MedSegFM): its files, its loop, its scores."""
