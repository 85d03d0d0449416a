"""Pretraining phases and finetuning from corrected labels."""
