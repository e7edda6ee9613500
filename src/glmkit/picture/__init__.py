"""Pictures of what a network does with a text: `glm inspect MODEL --text "..." --picture FILE.png`."""
