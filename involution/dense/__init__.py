"""Dense prediction with involution (Tables 3, 4, 5 and 7): backbone, pyramid, segmentors and detectors."""
