import formats.missing  # every command of the lab passes here first
