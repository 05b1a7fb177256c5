//! What Landlock refuses.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope,
};

use super::layers::Status;

/// The calling thread can open nothing, connect by TCP to nobody, and reach no abstract
/// socket or process outside. Where the kernel does not know all of that, the rest.
pub fn landlock() -> Result<Status, RulesetError> {
    let newest = ABI::V10;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(newest))?
        .handle_access(AccessNet::from_all(newest))?
        .scope(Scope::from_all(newest))?
        .create()?
        .restrict_self()?;
    Ok(match ruleset.ruleset {
        RulesetStatus::NotEnforced => Status::Absent("this kernel has none".to_owned()),
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Status::Active,
    })
}
