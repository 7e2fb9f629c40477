"""From local copies of public sets to a file of safety rows: `immunotune rows sources | build | check | card`."""
