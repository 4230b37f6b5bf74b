"""The speed benchmark of `dynamo-lm bench`: every method of decoding the same weights, raced in one run.

`methods` lists what is raced, `runners` runs it, `prompts` reads what is continued. `race` interleaves and
repeats, `summary` turns a race into numbers, `roofline` measures the floor that memory sets, `tables` presents it all and
`benchmark` puts it together. Other programs, random models, profiles and pictures are in the repository's `benchmarks/`.
"""
