from farfield.cli import main

main()
