"""``python -m modelport``: the command line."""

from modelport.cli import main

if __name__ == "__main__":
    main()
