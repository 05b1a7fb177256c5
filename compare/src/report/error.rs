//! Why a report cannot be written down.

/// Why a report cannot be written down.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// As JSON.
    #[error("writing the record as JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// As CSV.
    #[error("writing the samples as CSV: {0}")]
    Csv(#[from] ::csv::Error),
}
