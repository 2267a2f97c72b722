"""The whole of vlkit at work in a few minutes: compose, train, save, load, transcribe, report. `vlkit demo` runs it.

digits.py   real handwritten digits, split by writer
strips.py   digits -> strips of one to five digits, of many sizes
"""
