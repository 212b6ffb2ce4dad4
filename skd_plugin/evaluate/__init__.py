"""`skd eval`: what a student is worth, alone and beside its teacher; docs/eval.md says what each number is."""
