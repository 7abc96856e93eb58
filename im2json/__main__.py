"""`python -m im2json` and `accelerate launch -m im2json`."""

from im2json.app import main

if __name__ == "__main__":
    main(prog_name="im2json")
