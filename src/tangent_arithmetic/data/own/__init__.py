"""Data sets of one's own, named by their source: `NAME=SOURCE`.

| source | data set |
|---|---|
| `FOLDER` | images in class folders, below train/, val/ and test/ or not split (`folders.py`) |
| `FILE.csv`, `FILE.tsv`, `FILE.parquet` | a table of paths and labels (`tables.py`) |
| `hub:ORG/NAME` | a data set of the Hugging Face hub (`hubs.py`) |
| `torchvision:CLASS` | a class of `torchvision.datasets` (`torch_sets.py`) |
| `python:MODULE:FACTORY` | what a function of the user's returns (`torch_sets.py`) |
| `SUITE:NAME` | a data set of another suite (`mixing.py`) |

`sources.py` reads the notation, `mixing.py` and `suite_file.py` make suites of such data sets.
"""
