"""The sources of batches: random data, lookups after a trace, and the Criteo data sets.

data_set.py            what every source offers, and how the flags choose one
random_data.py         random data
trace.py               profiles of traces, and lookups after them; a program
uniform_stream.py      the random numbers of both
criteo.py              batches of the Criteo data sets
criteo_files.py        the files that the flags name, and the rows of each split in them
criteo_rows.py         one row per sample: the format of these files
sample_order.py        the order of training samples in an epoch
criteo_preprocess.py   from Criteo's text to files of rows; a program
criteo_text.py         from a chunk of text to numbers
criteo_numbering.py    from category codes to ids, within a given memory
criteo_manifest.py     what files of rows were made from
criteo_generator.py    makes click logs with a signal to learn; a program
"""
