"""Operations counted; speed and memory measured."""
