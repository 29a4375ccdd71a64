# The base-line: InternVL3-1B, the chat model as it is, on A-OKVQA, asked as InternVL's own
# evaluation asks its multiple-choice questions. Expected accuracy: not measured yet (chance 25.0).
# The second command asks the same model to think in words first.
#     python prepare.py && python train.py config/zeroshot.py
#     python train.py config/zeroshot.py --out_dir=out-zeroshot-steps --max_new_tokens=512 \
#       --prompt='<image>\n{question}\n{choices}\nThink step by step, then write: The answer is X.'
data_dir = 'data/aokvqa'
out_dir = 'out-zeroshot'
init_from = 'OpenGVLab/InternVL3-1B'
eval_only = True             # validation and test, and A-OKVQA's prediction files

template = 'chatml'          # chat turns, as this checkpoint was trained
prompt = ("<image>\n{question}\n{choices}\n"
          "Answer with the option's letter from the given choices directly.")
answer = '{letter}'
max_new_tokens = 16          # a longer answer is counted as cut off

max_tiles = 8                # as prepared
max_length = 2560
dtype = 'bfloat16'
