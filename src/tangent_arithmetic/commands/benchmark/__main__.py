"""`python -m tangent_arithmetic.commands.benchmark`."""

from tangent_arithmetic.commands.benchmark import main

raise SystemExit(main())
