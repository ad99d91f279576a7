"""Training rows for questions that a model cannot answer: refusals and answers by its measured
accuracy.

Source: report, section 4.4 and appendix A.1.
"""
