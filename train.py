"""Fine-tune PaliGemma with QLoRA to turn pictures of documents into JSON: `im2json train` as a script.

accelerate launch train.py --r 16          the embedded base model and synthetic receipts, no network and no GPU needed
accelerate launch train.py --preset cord   PaliGemma-3B on CORD v2, one 16 GB GPU
python train.py --check --dataset FOLDER   look at the data first: bad rows, copies, lengths, keys, and a page of it
python train.py --plan --preset cord       what a run will take: steps, memory, time; nothing is kept
"""

from im2json.app import train as main

if __name__ == "__main__":
    main()
