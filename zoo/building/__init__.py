"""The main job: stages that are kept, what they give, and what is told of them.

`job` is the whole of it and `stages` and `engine_stages` its steps; `exporting` makes packages of what it left.
"""
