"""The subcommands of `zoobot-hf`: a module each, with `add_options` and `run`, imported when it is called."""
