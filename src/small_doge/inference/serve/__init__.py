"""A model over HTTP: the OpenAI API and a chat page, from one folder, on this machine unless told otherwise.

``settings`` holds the recipe, ``schema`` what requests may say, ``models`` a model that gives one token at a time,
``jobs`` the text of one request, ``scheduler`` whose turn it is, ``guard`` what is checked before a body is read,
``connections`` how long one may say nothing, ``app`` the routes, ``run`` the command.
"""

from .run import serve
from .settings import ServeRecipe

__all__ = ["ServeRecipe", "serve"]
