"""What routes cost: multiply-adds counted, latencies measured on a device, or predicted for it.

`klas_zoo.profiles` holds the formulas and the records; here they meet families and their anchors.
"""
