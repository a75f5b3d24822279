"""The agreement of a group's members: who they are, and what became of each call. Pure; start at `agreement`.

agreement    the machine, its theory and its table of states
views        who is in a group, and its names             member            where this node stands
dispatch     each message to the part that it is for      failure_detector  whom this member can work with
coordinator  the coordinator's part in a call             participant       this member's
view_change  how survivors agree on the next view         recovery          what became of a call whose view broke up
join         letting newcomers in                         witnesses         whose word counts about another view
events       what the machine is told and asks for        outbox            where its parts put that
messages     what members say, of `fields`                message_codec     as bytes

A new message is declared in `messages` and has an arm in `dispatch`.
"""
