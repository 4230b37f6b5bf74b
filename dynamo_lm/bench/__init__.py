"""The speed benchmark of `dynamo-lm bench`: every method of decoding the same weights, raced in one run.

`methods` lists what is raced. `runners` and `peers` run it. `race` interleaves and repeats it. `roofline` and `step_profile`
say what a step must cost and where its time goes. `prompts` and `random_model` make prompts and models. `tables` and `plot`
present the results.
"""
