"""What a model does not know: refusals and answers by its own measured accuracy.

Source: report, section 4.4 and appendix A.1.
"""
