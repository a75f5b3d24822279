"""Task sets of the package verifiers, scored and played in processes of their own.

task_sets     questions, and what their answers earn
episodes      its environments and tools, with the policy as their agent
"""
