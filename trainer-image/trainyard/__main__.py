"""python -m trainyard"""

import sys

from trainyard.cli.main import main

sys.exit(main())
