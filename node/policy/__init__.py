"""The policy: a causal language model with its tokenizer, and how text becomes its tokens.

load            the policy itself, from a folder or a model id
prompt          a question as the turns of a chat, or as plain text
completion_text between a completion's tokens and its text
detection       what this machine is, and how large a model is
memory          what a node with a model holds at once
export          its weights as an ordinary model folder
model_card      how an exported model came about
builtin/        the policy that ships with the node; examples/make_builtin.py made it
"""
