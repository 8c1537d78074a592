"""Operations of jagged sequence models: one operation a folder, a readable torch version in each.

Knows nothing of steps/ and needs torch alone.
"""
