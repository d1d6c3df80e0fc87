"""The paper's tables and figures: each a small description (``catalogue``), all run by one runner (``runner``)."""
