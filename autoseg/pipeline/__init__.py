"""The verbs: each module wires the rooms into what one command does. Only here are planners and datasets imported."""
