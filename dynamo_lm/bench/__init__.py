"""The speed benchmark behind `dynamo-lm bench`: every way of decoding the same weights, raced in one run.

`ways` says what is raced, `contenders` and `peers` carry it out, `measure` interleaves and repeats it, `floor` and `parts`
say what a step must cost and where its time goes, `inputs` and `shapes` bring prompts and models, `results` and `figure`
present it.
"""
