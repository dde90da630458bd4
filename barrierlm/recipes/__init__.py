"""The complete fine-tuning recipe behind ``barrierlm finetune`` and ``barrierlm demo``.

Needs the extra ``recipes`` (``pip install 'barrierlm[recipes]'``); `import barrierlm` does not import it.
"""
