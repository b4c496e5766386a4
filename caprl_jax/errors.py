"""What the user can mend: commands tell it in one paragraph, without a traceback."""


class UserError(ValueError):
    """Config, model, data or image that can't be used; the message names it and the way out."""
