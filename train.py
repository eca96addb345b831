"""Train a model that learns the order in which it reads its input.

python train.py                                      the default: handwritten digits, an SSM probe
python train.py method=sinkhorn model=vit_b          any method on any backbone
python train.py -m seed=0,1,2 method=sort_ste,reorder   every combination, each in its own process
python train.py --help                               every choice
"""

import sys

from permlab.cli import main

if __name__ == "__main__":
    sys.exit(main("train"))
