"""The paper's tables and figures, measured in the miniature."""
