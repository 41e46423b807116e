"""The `mla-deploy` command: click commands, one file each, and no logic.

Commands may import every other part of mla-deploy; no other part imports them.
"""
