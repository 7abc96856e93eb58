"""Run an ablation grid, and rank what it finds: `im2json sweep` as a script.

python sweep.py grid.json             every point of the grid, then the leaderboard, then the test split for the winner
python sweep.py grid.json --dry-run   the points, their commands, and what is done
"""

from im2json.app import sweep as main

if __name__ == "__main__":
    main()
