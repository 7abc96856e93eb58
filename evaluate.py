"""How good is the JSON: of a finished run before and after, of two runs side by side, of predictions made anywhere.

`im2json evaluate` as a script:

python evaluate.py runs/NAME
python evaluate.py runs/NAME --against runs/OTHER
python evaluate.py --predictions FILE.jsonl [--targets FILE.jsonl]
"""

from im2json.app import evaluate as main

if __name__ == "__main__":
    main()
